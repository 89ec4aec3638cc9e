#include "avx512.h"

namespace sqap {

const Path avx512vnni = {"avx512vnni", has_avx512vnni, quantize, linear<Vnni<Avx512>>, matmul<Vnni<Avx512>>,
                         layer<Vnni<Avx512>>, look<Vnni<Avx512>>, pack<Vnni<Avx512>>};

}  // namespace sqap
