"""What lowered graphs call: conversions between shardings, vocabulary-parallel layers, stateless random numbers."""
