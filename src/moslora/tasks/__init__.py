"""One file per modality, and the table that names them."""
