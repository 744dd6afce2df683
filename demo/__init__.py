"""A web page to try a trained model on."""
