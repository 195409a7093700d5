"""An unmodified model becomes one flat functional graph."""
