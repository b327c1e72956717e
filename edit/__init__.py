"""An image is edited by a frozen model: inversion, attention control, guidance towards another prompt."""
