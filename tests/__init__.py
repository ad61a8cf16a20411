"""The test suite. A package, so that no dependency's own top-level ``tests`` can stand in for it."""
