"""Adapters to other libraries. Importing one imports its library."""
