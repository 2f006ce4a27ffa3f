"""σReparam (Zhai et al. 2023) and the norms it is compared with: conversion, training, and the way back."""
