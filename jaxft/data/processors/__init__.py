"""Raw values to arrays: text to token ids."""
