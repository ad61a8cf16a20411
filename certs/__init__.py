"""The federation's identity: authority, roles, and the TLS contexts every process uses."""
