"""Sources that a fit asks: our decoder, torch, and a server; `protocol` says what they are asked."""
