"""Private names and patches of upstream libraries, one file for each library."""
