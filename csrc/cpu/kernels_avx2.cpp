#define PILE_ISA avx2
#include "kernels.h"
