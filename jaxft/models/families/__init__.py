"""One module per model family, found by its name; :class:`jaxft.models.contract.Family` says what it defines."""
