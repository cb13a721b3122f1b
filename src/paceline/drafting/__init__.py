"""PROPOSE: drafters behind one interface. Knows neither who chose them nor how they are judged."""
