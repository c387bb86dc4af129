"""What mixes the tokens of a text: attention, short convolutions and gated linear recurrences."""
