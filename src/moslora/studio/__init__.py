"""The verb studio: a page in the browser over the same recipes, runs and verbs.

Modules beside ``views`` know nothing of gradio and are tested without a browser; ``views`` has one file per tab, and
nothing there but components and calls.
"""
