"""The synthetic world: people, places, stories and questions with known answers; text to facts both ways."""
