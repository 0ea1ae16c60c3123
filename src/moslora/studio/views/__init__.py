"""The tabs of the page, one file each. Importing them imports gradio."""
