"""The families of decoders, one file of data each, and the records that describe them."""
