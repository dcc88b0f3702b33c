#define PILE_ISA avx512
#include "kernels.h"
