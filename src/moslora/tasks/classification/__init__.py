"""Classification of texts, pairs of texts and words, on encoders and decoders."""
