"""What to try, with the reason and the source of each piece of advice; the verb advise."""
