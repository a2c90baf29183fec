"""Model folders: Hugging Face layout in and out, formats of weights, adapters for peft, proof of parity."""
