"""Reports of runs and corpora as HTML, and their inspection in a terminal."""
