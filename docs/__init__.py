"""Pages of the documentation, and the programs that build the site and record its picture."""
