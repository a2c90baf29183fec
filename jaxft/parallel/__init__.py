"""How arrays lie on the devices of a mesh."""
