"""PROPOSE: drafters with one interface. This room knows no policy and no judge."""
