"""What mixes the tokens of a text beside attention: short convolutions and gated linear recurrences."""
