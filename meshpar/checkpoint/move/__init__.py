"""Moving bytes between divisions in bounded memory."""
