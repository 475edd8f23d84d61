"""The whole way from dumps to a trained model, small."""
