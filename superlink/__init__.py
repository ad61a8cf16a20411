"""The SuperLink: stock Flower behind mutual TLS and the role guard."""
