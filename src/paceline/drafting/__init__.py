"""PROPOSE: drafters with one interface. Knows neither how they are chosen nor how drafts are judged."""
