"""Rows out of files and libraries, whatever their format, and rows into files."""
