"""Campaigns ask for samples; batches bring them; data sets keep them."""
