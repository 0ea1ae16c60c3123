"""Private names, patches and registrations of upstream libraries: one file or package for each library.

Every entry says what it is for, the versions in which it was seen, what breaks without it, and when it can go.
``tests/test_compat.py`` holds that no other file of this package reaches into a library's private parts.
"""
