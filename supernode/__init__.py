"""The SuperNode: a site's only process that talks to the SuperLink."""
