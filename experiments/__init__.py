"""What was asked and measured. Experiments import the scripts and the package; neither imports anything from here."""
