"""nano: a FLUX.2 in miniature, its world of pictures, and the checker that reads them."""
