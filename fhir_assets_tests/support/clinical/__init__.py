"""Clinical questions: their SQL, their answers computed from the resources, and resources that they are asked of."""
