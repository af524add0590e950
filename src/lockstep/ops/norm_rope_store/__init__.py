"""What happens to new heads between their product and attention: norms, rotation, storing. In one operator."""
