"""The Flower app: ServerApp, ClientApp and the learning core between them."""
