"""The Hugging Face hub as a place for moved adapters: what is uploaded, what the hub is asked, how a refusal reads."""
