"""Does the parallel program compute what the model computes?"""
