"""Sets of labelled pictures: read them, keep them as tars, look at them."""
