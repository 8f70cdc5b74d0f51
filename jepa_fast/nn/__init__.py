"""Network parts: ViT encoder, predictor, and what the models add to them."""
