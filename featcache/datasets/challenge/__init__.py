"""What the readers of the two radiograph challenges share, RSNA's and SIIM's."""
