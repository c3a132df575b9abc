"""What presses on an autoencoder: each adversary has networks, the phases that train them, a weight, and a pressure."""
