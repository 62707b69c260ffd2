// weights: every format that weights may have. Kernels get theirs as a define for each weight, such as W_UP=Plain.

#include "bf12.cuh"
#include "plain.cuh"
