#define PILE_ISA baseline
#include "kernels.h"
