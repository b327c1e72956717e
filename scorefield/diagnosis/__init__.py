"""Does a wrapped teacher denoise? Usual mistakes of a wrapper, found from a few images before any training."""
