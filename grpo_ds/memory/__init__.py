"""What a run will need: predicted bytes on the card and in RAM, by phase and component, and what fits."""
