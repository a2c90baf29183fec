"""What happens when something is wrong: batteries of faults, each with a runner that counts what goes wrong with them."""
