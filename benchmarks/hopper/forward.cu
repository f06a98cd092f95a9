// Forward attention for Hopper, warp-specialised: one warp loads tiles by TMA, each consumer warpgroup owns 64 query
// rows, keeps scores, probabilities and output in registers, and multiplies with wgmma. While a warpgroup takes the
// exponentials of one tile, the tensor cores work on its own previous P V and on the other warpgroup's products.
//
// Compiled by hopper_forward.py for each configuration; no headers, so NVRTC alone suffices.
//   HF_D, HF_DV      head dims (64, 128 or 256)        HF_WGS     consumer warpgroups (2 or 3)
//   HF_BN            keys a tile (64 or 128)           HF_STAGES  tiles of k and v in flight
//   HF_QSTAGES       tiles of q in flight (1 or 2)
//   HF_CAUSAL        bottom-right aligned              HF_SCORES  q and k in 0: bf16, 1: e4m3, 2: int8
//   HF_LAZY          log2 growth of the running maximum that is tolerated before the output is rescaled; 0: none
//   HF_SKIP          a tile is skipped if all its scores are this much (log2) under the running maxima, which changes
//                    weights by up to n 2^-HF_SKIP; 0: never
//   HF_ACROSS        a tile of queries begins while the one before ends
//   HF_PINGPONG      warpgroups take turns at the tensor cores
//   HF_SPARSE        q is a 2:4 sparse operand in registers, plus HF_SPARSE - 1 parts of 32 features once more; 0: no
//   HF_QREGS         q is kept in registers
//   HF_CODE          q comes as codes of this many entries (needs HF_QREGS, HF_QSTAGES 1); 0: as rows
//   HF_CLUSTER       blocks that share the tiles of k and v, on neighbouring tiles of queries (1 or 2)

typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap {
  u64 opaque[16];
};

struct Params {
  unsigned short* out;     // (b, sq, hq, dv) bf16
  float* lse;              // (b, hq, sq)
  int* counter;            // one 0: the next tile of work
  const float* q_scale;    // (b, hq, sq), HF_SCORES
  const float* k_scale;    // (b, hkv, tiles of keys), HF_SCORES
  const void* q_values;    // (b, hq, sq, 2, 4, d / 32, 2, 2) bf16, HF_SPARSE; or (b, sq, hq, HF_CODE)
  const void* q_where;     // (b, hq, sq, 2, d / 32) int32; or indices as bytes
  const unsigned char* q_more;  // (b, hq, sq / 64 rounded up): which parts of 32 features have a second set
  float scale;             // softmax_scale * log2(e)
  int sq, sk, hq, hkv, heads, m_tiles, together;
};

constexpr int BM = 64 * HF_WGS, BN = HF_BN, D = HF_D, DV = HF_DV, STAGES = HF_STAGES, Q_STAGES = HF_QSTAGES;
constexpr int SIZE = HF_SCORES ? 1 : 2;
constexpr int ROW = D * SIZE < 128 ? D * SIZE : 128;  // bytes of a row of q or k in one swizzled part
constexpr int Q_BYTES = BM * D * SIZE, K_BYTES = BN * D * SIZE, V_BYTES = BN * DV * 2;

// ------------------------------------------------------------------------------------------------- primitives

#ifdef HF_HOST
#include HF_HOST
#else
template <int N>
struct Wgmma;

template <>
struct Wgmma<64> {
  static __device__ __forceinline__ void int8(int (&d)[32], u64 a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21, "
        "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},%32,%33, p;\n}\n "
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]), "+r"(d[8]),
          "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]), "+r"(d[16]),
          "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]), "+r"(d[24]),
          "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31])
        : "l"(a), "l"(b), "r"(add));
  }
  static __device__ __forceinline__ void sparse(float (&d)[32], const u32* a, u64 b, u32 meta, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %38, 0;\n"
        "wgmma.mma_async.sp.sync.aligned.m64n64k32.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21, "
        "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35},%36,%37, 0, p, 1, 1, "
        "0;\n}\n "
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(meta), "r"(add));
  }
  static __device__ __forceinline__ void bf16(float (&d)[32], u64 a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21, "
        "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},%32,%33, p, 1, 1, 0, 0;\n}\n "
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(a), "l"(b), "r"(add));
  }
  static __device__ __forceinline__ void fp8(float (&d)[32], u64 a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21, "
        "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},%32,%33, p, 1, 1;\n}\n "
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(a), "l"(b), "r"(add));
  }
  template <int TRANSPOSED>
  static __device__ __forceinline__ void rows(float (&d)[32], const u32* a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21, "
        "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35},%36, p, 1, 1, %38;\n}\n "
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TRANSPOSED));
  }
};

template <>
struct Wgmma<128> {
  static __device__ __forceinline__ void int8(int (&d)[64], u64 a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21, "
        "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41, "
        "%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61, "
        "%62,%63},%64,%65, p;\n}\n "
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]), "+r"(d[8]),
          "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]), "+r"(d[16]),
          "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]), "+r"(d[24]),
          "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31]), "+r"(d[32]),
          "+r"(d[33]), "+r"(d[34]), "+r"(d[35]), "+r"(d[36]), "+r"(d[37]), "+r"(d[38]), "+r"(d[39]), "+r"(d[40]),
          "+r"(d[41]), "+r"(d[42]), "+r"(d[43]), "+r"(d[44]), "+r"(d[45]), "+r"(d[46]), "+r"(d[47]), "+r"(d[48]),
          "+r"(d[49]), "+r"(d[50]), "+r"(d[51]), "+r"(d[52]), "+r"(d[53]), "+r"(d[54]), "+r"(d[55]), "+r"(d[56]),
          "+r"(d[57]), "+r"(d[58]), "+r"(d[59]), "+r"(d[60]), "+r"(d[61]), "+r"(d[62]), "+r"(d[63])
        : "l"(a), "l"(b), "r"(add));
  }
  static __device__ __forceinline__ void sparse(float (&d)[64], const u32* a, u64 b, u32 meta, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %70, 0;\n"
        "wgmma.mma_async.sp.sync.aligned.m64n128k32.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21, "
        "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41, "
        "%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61, "
        "%62,%63}, {%64,%65,%66,%67},%68,%69, 0, p, 1, 1, 0;\n}\n "
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
          "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
          "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
          "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(meta), "r"(add));
  }
  static __device__ __forceinline__ void bf16(float (&d)[64], u64 a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21, "
        "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41, "
        "%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61, "
        "%62,%63},%64,%65, p, 1, 1, 0, 0;\n}\n "
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
          "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
          "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
          "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "l"(a), "l"(b), "r"(add));
  }
  static __device__ __forceinline__ void fp8(float (&d)[64], u64 a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21, "
        "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41, "
        "%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61, "
        "%62,%63},%64,%65, p, 1, 1;\n}\n "
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
          "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
          "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
          "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "l"(a), "l"(b), "r"(add));
  }
  template <int TRANSPOSED>
  static __device__ __forceinline__ void rows(float (&d)[64], const u32* a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21, "
        "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41, "
        "%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61, "
        "%62,%63}, {%64,%65,%66,%67},%68, p, 1, 1, %70;\n}\n "
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
          "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
          "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
          "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TRANSPOSED));
  }
};

template <>
struct Wgmma<256> {
  template <int TRANSPOSED>
  static __device__ __forceinline__ void rows(float (&d)[128], const u32* a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %133, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21, "
        "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41, "
        "%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61, "
        "%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81, "
        "%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100, "
        "%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116, "
        "%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, {%128,%129,%130,%131},%132, "
        "p, 1, 1, %134;\n}\n "
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
          "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
          "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
          "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]),
          "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), "+f"(d[72]),
          "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]),
          "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]),
          "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), "+f"(d[96]),
          "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), "+f"(d[104]),
          "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]),
          "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]),
          "+f"(d[119]), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]),
          "+f"(d[126]), "+f"(d[127])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TRANSPOSED));
  }
};

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u32 bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}

__device__ __forceinline__ void expect(u32 bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

__device__ __forceinline__ void arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

__device__ __forceinline__ void wait(u32 bar, u32 parity) {
  u32 done = 0;
  while (!done)
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
}

// A box of a 4d tensor map (feature, row, head, sequence).
__device__ __forceinline__ void load(u32 to, const TensorMap* map, u32 bar, int feature, int row, int head, int b) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(bar), "r"(feature), "r"(row), "r"(head), "r"(b)
      : "memory");
}

#if HF_CLUSTER > 1
#define LOAD_PART load_shared
// The same to both blocks of a cluster, and to the barrier of each.
__device__ __forceinline__ void load_shared(u32 to, const TensorMap* map, u32 bar, int feature, int row, int head,
                                            int b) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
      "l"(map), "r"(bar), "r"(feature), "r"(row), "r"(head), "r"(b), "h"((unsigned short)3)
      : "memory");
}

__device__ __forceinline__ u32 rank_in_cluster() {
  u32 r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}

__device__ __forceinline__ void meet() {
  asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}
#else
#define LOAD_PART load
__device__ __forceinline__ u32 rank_in_cluster() { return 0; }
#endif

// A place in the ring of k or v is free, for all blocks that write there. Called by whole warps.
__device__ __forceinline__ void release(u32 bar, int lane) {
#if HF_CLUSTER > 1
  if (lane < 2)
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(bar),
        "r"(lane)
        : "memory");
#else
  if (lane == 0) arrive(bar);
#endif
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// The compiler does not know that wgmma goes on after its instruction: reads may not move up past this.
template <int N>
__device__ __forceinline__ void pin(int (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}
template <int N>
__device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

__device__ __forceinline__ void turn_wait(int wg) {
  asm volatile("bar.sync %0, 256;" ::"r"(1 + wg) : "memory");
}
__device__ __forceinline__ void turn_pass(int wg) {
  asm volatile("bar.arrive %0, 256;" ::"r"(1 + (wg + 1) % HF_WGS) : "memory");
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// Whether it holds in all threads of a warpgroup.
__device__ __forceinline__ bool all_of_warpgroup(bool x, int wg) {
  u32 all;
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.b32 p, %1, 0;\nbarrier.cta.red.and.pred q, %2, 128, p;\n"
      "selp.u32 %0, 1, 0, q;\n}\n"
      : "=r"(all)
      : "r"((int)x), "r"(8 + wg)
      : "memory");
  return all != 0;
}
__device__ __forceinline__ void warpgroup_sync(int wg) { asm volatile("bar.sync %0, 128;" ::"r"(8 + wg) : "memory"); }

__device__ __forceinline__ void store_zeros(u32 to) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
}
__device__ __forceinline__ void store_half(u32 to, u32 bits) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(to), "h"((unsigned short)bits) : "memory");
}
// Four 8 x 8 matrices of 16 bits, whose rows the lanes point at.
__device__ __forceinline__ void load_matrices(u32* to, u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ void never(bool x) {
  if (x) asm volatile("trap;");
}
__device__ __forceinline__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void few_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(HF_WGS == 2 ? 24 : 32));
}
__device__ __forceinline__ void many_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(HF_WGS == 2 ? 240 : 160));
}
#endif

#define INF __int_as_float(0x7f800000)

#if HF_SCORES == 2
// Sums of products start at the bits of 1.5 * 2^23, so that, read as floats, they are 1.5 * 2^23 plus the sum.
typedef int Score;
constexpr float SHIFT = 12582912.0f;
__device__ __forceinline__ float get(int x) { return __int_as_float(x); }
__device__ __forceinline__ void set(int& x, float y) { x = __float_as_int(y); }
#else
typedef float Score;
constexpr float SHIFT = 0.0f;
__device__ __forceinline__ float get(float x) { return x; }
__device__ __forceinline__ void set(float& x, float y) { x = y; }
#endif

// The same in all lanes, and known to be: descriptors are then made by the uniform unit, not moved to it one by one.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

__device__ __forceinline__ u64 descriptor(u32 address, int leading, int stride, int row) {
  address = uniform(address);
  const u64 swizzle = row == 128 ? 1 : 2;
  return (u64)((address & 0x3ffff) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 | swizzle << 62;
}

__device__ __forceinline__ u64 further(u64 at, int bytes) { return at + (bytes >> 4); }

// ------------------------------------------------------------------------------------------------- work

struct Work {
  int m0, head, b, tiles;  // first query, head, sequence, tiles of keys
};

// Heads that fit into L2 together take turns; the longest rows of tiles first.
__device__ __forceinline__ Work work_of(const Params& p, int t) {
  const int part = p.together * p.m_tiles;
  const int first = t / part * p.together, r = t % part;
  const int here = min(p.together, p.heads - first);
  const int bh = first + r % here;
  Work w;
  const int first_m = (p.m_tiles - 1 - r / here) * BM * HF_CLUSTER;
  w.m0 = first_m + rank_in_cluster() * BM;
  w.head = bh % p.hq;
  w.b = bh / p.hq;
  int keys = p.sk;
  if (HF_CAUSAL) keys = min(keys, first_m + BM * HF_CLUSTER + p.sk - p.sq);
  w.tiles = keys <= 0 ? 0 : (keys + BN - 1) / BN;
  return w;
}

struct Shared {
  u32 q, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty, work_full, work_empty;
  int* work;
};

__device__ __forceinline__ void produce(const Params& p, const Shared& s, const TensorMap* mq, const TensorMap* mk,
                                        const TensorMap* mv) {
  const int total = p.heads * p.m_tiles, mine = rank_in_cluster() * (BN / HF_CLUSTER);
  int t = blockIdx.x / HF_CLUSTER, queries = 0, n_k = 0, n_v = 0;
  for (int i = 0;; ++i) {
    wait(s.work_empty + 8 * (i & 1), (i >> 1 & 1) ^ 1);
    s.work[i & 1] = t;
    arrive(s.work_full + 8 * (i & 1));
    if (t >= total) break;
    // A cluster would have to agree on what it got.
    const int next = HF_CLUSTER > 1 ? t + gridDim.x / HF_CLUSTER : atomicAdd(p.counter, 1) + gridDim.x;
    const Work w = work_of(p, t);
    t = next;
    if (w.tiles == 0) continue;
    const int hk = w.head / (p.hq / p.hkv);
    if (!HF_SPARSE && !HF_CODE) {
      const int at = queries % Q_STAGES;
      wait(s.q_empty + 8 * at, (queries / Q_STAGES & 1) ^ 1);
      expect(s.q_full + 8 * at, Q_BYTES);
      for (int c = 0; c < D * SIZE / ROW; ++c)
        load(s.q + at * Q_BYTES + c * BM * ROW, mq, s.q_full + 8 * at, c * ROW / SIZE, w.m0, w.head, w.b);
      ++queries;
    }
    // v of a tile is needed only after k of the next.
    for (int n = w.tiles - 1; n >= -1; --n) {
      if (n >= 0) {
        const int at = n_k % STAGES;
        wait(s.k_empty + 8 * at, (n_k / STAGES & 1) ^ 1);
        expect(s.k_full + 8 * at, K_BYTES);
        for (int c = 0; c < D * SIZE / ROW; ++c)
          LOAD_PART(s.k + at * K_BYTES + c * BN * ROW + mine * ROW, mk, s.k_full + 8 * at, c * ROW / SIZE,
                    n * BN + mine, hk, w.b);
        ++n_k;
      }
      if (n < w.tiles - 1) {
        const int at = n_v % STAGES;
        wait(s.v_empty + 8 * at, (n_v / STAGES & 1) ^ 1);
        expect(s.v_full + 8 * at, V_BYTES);
        for (int c = 0; c < DV / 64; ++c)
          LOAD_PART(s.v + at * V_BYTES + c * BN * 128 + mine * 128, mv, s.v_full + 8 * at, c * 64,
                    (n + 1) * BN + mine, hk, w.b);
        ++n_v;
      }
    }
  }
}

// What a thread of a consumer warpgroup holds: rows r and r + 8, columns 8 j + 2 (lane % 4) and the next, of all tiles.
struct Row {
#if HF_QREGS
  u32 q[D / 4];
#endif
#if HF_SPARSE
  u32 q[D / 8], where[D / 32];                       // the first two kept features of each four
  u32 q_more[4 * HF_SPARSE], where_more[HF_SPARSE];  // and the others, of parts that have any
  int part[HF_SPARSE];
#endif
  float top[2], sum[2], factor[2];  // running maximum in log2 units, sum of exponentials, scale of scores
  int last[2];                      // the last key that is seen
};

#if HF_SPARSE
// A thread's parts of rows r and r + 8: of each 32 features quads t and t + 4, and the places of 4 quads.
__device__ __forceinline__ void load_sparse(Row& row, const Params& p, long long head, int r, int block, int t) {
  constexpr int PARTS = D / 32;
  int more = p.q_more[head * ((p.sq + 63) / 64) + min(block, (p.sq - 1) / 64)];
  const int shift = 16 * (t & 1);
#pragma unroll
  for (int i = 0; i < HF_SPARSE - 1; ++i) {
    row.part[i] = more ? __ffs(more) - 1 : -1;
    more &= more - 1;
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const bool here = r + 8 * h < p.sq;
    const long long at = (head * p.sq + (here ? r + 8 * h : 0)) * 2;
    const u32* values = (const u32*)p.q_values + at * (D / 4) + t * (D / 16);
    const u32* where = (const u32*)p.q_where + at * PARTS;
#pragma unroll
    for (int i = 0; i < PARTS / 2; ++i) {
      const uint4 got = here ? ((const uint4*)values)[i] : make_uint4(0, 0, 0, 0);
      row.q[8 * i + h] = got.x;
      row.q[8 * i + 2 + h] = got.y;
      row.q[8 * i + 4 + h] = got.z;
      row.q[8 * i + 6 + h] = got.w;
    }
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
      const u32 bits = (where[i] >> shift & 0xffff) << 16 * h;
      row.where[i] = h == 0 ? bits : row.where[i] | bits;
    }
#pragma unroll
    for (int i = 0; i < HF_SPARSE - 1; ++i) {
      const bool there = here && row.part[i] >= 0;
      const int part = max(row.part[i], 0);
      const uint2 got = there ? ((const uint2*)(values + D / 4))[part] : make_uint2(0, 0);
      row.q_more[4 * i + h] = got.x;
      row.q_more[4 * i + 2 + h] = got.y;
      const u32 bits = (where[PARTS + part] >> shift & 0xffff) << 16 * h;
      row.where_more[i] = h == 0 ? bits : row.where_more[i] | bits;
    }
  }
#pragma unroll
  for (int i = 0; i < HF_SPARSE - 1; ++i) row.part[i] = max(row.part[i], 0);
}
#endif

__device__ __forceinline__ void scores(Score (&x)[BN / 2], const Row& row, const Shared& s, int wg, int at_q,
                                       int at_k) {
  const u64 k = descriptor(s.k + at_k * K_BYTES, 16, 8 * ROW, ROW);
#if HF_SPARSE
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < D / 32; ++i)
    Wgmma<BN>::sparse(x, row.q + 4 * i, further(k, i * 64 / ROW * BN * ROW + i * 64 % ROW), row.where[i], i > 0);
#pragma unroll
  for (int i = 0; i < HF_SPARSE - 1; ++i)
    Wgmma<BN>::sparse(x, row.q_more + 4 * i, further(k, (row.part[i] >> 1) * BN * ROW + (row.part[i] & 1) * 64),
                      row.where_more[i], 1);
#elif HF_QREGS
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < D / 16; ++i)
    Wgmma<BN>::rows<0>(x, row.q + 4 * i, further(k, i * 32 / ROW * BN * ROW + i * 32 % ROW), i > 0);
#else
#if HF_SCORES == 2
#pragma unroll
  for (int i = 0; i < BN / 2; ++i) x[i] = __float_as_int(SHIFT);
#endif
  const u64 q = descriptor(s.q + at_q * Q_BYTES + wg * 64 * ROW, 16, 8 * ROW, ROW);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < D * SIZE / 32; ++i) {
    const u64 a = further(q, i * 32 / ROW * BM * ROW + i * 32 % ROW);
    const u64 b = further(k, i * 32 / ROW * BN * ROW + i * 32 % ROW);
#if HF_SCORES == 2
    Wgmma<BN>::int8(x, a, b, 1);
#elif HF_SCORES == 1
    Wgmma<BN>::fp8(x, a, b, i > 0);
#else
    Wgmma<BN>::bf16(x, a, b, i > 0);
#endif
  }
#endif
  wgmma_commit();
}

__device__ __forceinline__ void times_v(float (&o)[DV / 2], const u32 (&p)[BN / 4], const Shared& s, int at_v) {
  const u64 v = descriptor(s.v + at_v * V_BYTES, BN * 128, 1024, 128);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < BN / 16; ++i)
    Wgmma<DV>::rows<1>(o, p + 4 * i, further(v, i * 16 * 128), 1);
  wgmma_commit();
}

// Scores -> probabilities, in place. Returns whether the output must be multiplied by shrink; skip: whether the tile
// weighs nothing (then x stays as it is).
template <bool MASKED>
__device__ __forceinline__ bool soften(Score (&x)[BN / 2], Row& row, float (&shrink)[2], float k_scale, int column,
                                       int wg, bool& skip) {
  if (MASKED) {
#pragma unroll
    for (int j = 0; j < BN / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (column + 8 * j + (e & 1) > row.last[e >> 1]) set(x[4 * j + e], -INF);
  }
  float factor[2], most[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    factor[r] = HF_SCORES ? row.factor[r] * k_scale : row.factor[r];
    float a = get(x[2 * r]), b = get(x[2 * r + 1]);
#pragma unroll
    for (int j = 1; j < BN / 8; ++j) {
      a = fmaxf(a, get(x[4 * j + 2 * r]));
      b = fmaxf(b, get(x[4 * j + 2 * r + 1]));
    }
    a = fmaxf(a, b);
    a = fmaxf(a, __shfl_xor_sync(~0u, a, 1));
    a = fmaxf(a, __shfl_xor_sync(~0u, a, 2));
    most[r] = (a - SHIFT) * factor[r];
  }
#if HF_SKIP
  if (!MASKED) {
    const bool low = most[0] < row.top[0] - (float)HF_SKIP && most[1] < row.top[1] - (float)HF_SKIP;
    skip = all_of_warpgroup(low, wg);
    if (skip) return false;
  }
#endif
  const bool grew = most[0] > row.top[0] + (float)HF_LAZY || most[1] > row.top[1] + (float)HF_LAZY;
  const bool rescale = __any_sync(~0u, grew);
  float base[2];
  if (rescale) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float top = fmaxf(row.top[r], most[r]);
      shrink[r] = row.top[r] == -INF ? 0.0f : exp2_fast(row.top[r] - top);
      row.sum[r] *= shrink[r];
      row.top[r] = top;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    base[r] = row.top[r] == -INF ? 0.0f : row.top[r];
    if (HF_SCORES == 2) base[r] = fmaf(SHIFT, factor[r], base[r]);
    float a = 0.0f, b = 0.0f;
#pragma unroll
    for (int j = 0; j < BN / 8; ++j) {
      float left = fmaf(get(x[4 * j + 2 * r]), factor[r], -base[r]);
      float right = fmaf(get(x[4 * j + 2 * r + 1]), factor[r], -base[r]);
      left = exp2_fast(left);
      right = exp2_fast(right);
      set(x[4 * j + 2 * r], left);
      set(x[4 * j + 2 * r + 1], right);
      a += left;
      b += right;
    }
    row.sum[r] += a + b;
  }
  return rescale;
}

__device__ __forceinline__ void pack_all(u32 (&p)[BN / 4], const Score (&x)[BN / 2]) {
#pragma unroll
  for (int i = 0; i < BN / 4; ++i) p[i] = pack(get(x[2 * i]), get(x[2 * i + 1]));
}

struct Count {
  int work, q, k, v;  // tiles of each seen so far, which tell the place in its ring
};

// Scores of the next tile and, PV, the product of the last one with v; then the exponentials of the first while the
// second runs. Returns whether the output must be multiplied by shrink.
template <bool MASKED, bool PV>
__device__ __forceinline__ bool step(Score (&x)[BN / 2], u32 (&prob)[BN / 4], float (&o)[DV / 2], Row& row,
                                     const Shared& s, int wg, int lane, int n, const float* k_scale, Count& count,
                                     float (&shrink)[2], bool& skip) {
  const float of_k = HF_SCORES ? k_scale[n] : 1.0f;
  const int at_k = uniform(count.k % STAGES), at_v = uniform(count.v % STAGES), at_q = uniform(count.q % Q_STAGES);
  wait(s.k_full + 8 * at_k, count.k / STAGES & 1);
  if (HF_PINGPONG) turn_wait(wg);
  scores(x, row, s, wg, at_q, at_k);
  wait(s.v_full + 8 * at_v, count.v / STAGES & 1);
  if (PV) times_v(o, prob, s, at_v);
  if (HF_PINGPONG) turn_pass(wg);
  wgmma_wait<PV ? 1 : 0>();
  pin(x);
  release(s.k_empty + 8 * at_k, lane);
  if (n == 0 && !HF_QREGS && lane == 0) arrive(s.q_empty + 8 * at_q);
  const bool rescale = soften<MASKED>(x, row, shrink, of_k, n * BN + 2 * (lane & 3), wg, skip);
  // Never true. Without it the assembler moves the exponentials down past the wait for P V, and nothing overlaps.
  never(row.sum[0] + row.sum[1] < 0.0f);
  wgmma_wait<0>();
  pin(o);
  release(s.v_empty + 8 * at_v, lane);
  ++count.k;
  ++count.v;
  return rescale;
}

__device__ __forceinline__ void multiply(float (&o)[DV / 2], const float (&by)[2]) {
#pragma unroll
  for (int i = 0; i < DV / 2; ++i) o[i] *= by[i >> 1 & 1];
}

#if HF_CODE
// The rows of a warpgroup from codes, where TMA would put them. Indices of a row are distinct.
__device__ __forceinline__ void expand_q(const Params& p, const Shared& s, const Work& w, int wg) {
  const int thread = threadIdx.x & 127, r = thread >> 1, q = w.m0 + wg * 64 + r;
  const u32 to = s.q + wg * 64 * ROW;
  warpgroup_sync(wg);  // all have read the rows before
#pragma unroll
  for (int i = 0; i < D / 16; ++i)
    store_zeros(to + i / 4 * BM * ROW + (i % 4 * 128 + thread) * 16);
  warpgroup_sync(wg);
  if (q < p.sq) {
    const long long at = ((w.b * (long long)p.sq + q) * p.hq + w.head) * HF_CODE + (thread & 1) * (HF_CODE / 2);
    const unsigned short* values = (const unsigned short*)p.q_values + at;
    const unsigned char* indices = (const unsigned char*)p.q_where + at;
#pragma unroll
    for (int i = 0; i < HF_CODE / 2; i += 4) {
      const uint2 v = *(const uint2*)(values + i);
      const u32 c = *(const u32*)(indices + i);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int f = c >> 8 * e & 255;
        const u32 a = to + (f >> 6) * BM * ROW + r * ROW + (((f >> 3 & 7) ^ (r & 7)) << 4) + (f & 7) * 2;
        store_half(a, (e < 2 ? v.x : v.y) >> 16 * (e & 1) & 0xffff);
      }
    }
  }
  warpgroup_sync(wg);
}
#endif

#if HF_QREGS
// q of a warpgroup as the first operand; its place in shared memory is free then.
__device__ __forceinline__ void load_q(Row& row, const Shared& s, int wg, int lane, int at) {
  const int r = (threadIdx.x >> 5 & 3) * 16 + (lane & 15);
  const u32 from = s.q + at * Q_BYTES + (wg * 64 + r) * ROW;
#pragma unroll
  for (int i = 0; i < D / 16; ++i)
    load_matrices(row.q + 4 * i, from + i / 4 * BM * ROW + ((i % 4 * 2 + (lane >> 4)) ^ (r & 7)) * 16);
  __syncwarp();
  if (lane == 0) arrive(s.q_empty + 8 * at);
}
#endif

// Lanes 0 to 3 hold columns 2 t, 2 t + 1 of four parts of 8; afterwards lane t holds all 8 columns of part t.
__device__ __forceinline__ void transpose(u32 (&a)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const u32 got = __shfl_xor_sync(~0u, odd ? a[i] : a[i + 1], 1);
    (odd ? a[i] : a[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const u32 got = __shfl_xor_sync(~0u, high ? a[i] : a[i + 2], 2);
    (high ? a[i] : a[i + 2]) = got;
  }
}

__device__ __forceinline__ const float* k_scale_of(const Params& p, const Work& w) {
  return p.k_scale + (long long)(w.b * p.hkv + w.head / (p.hq / p.hkv)) * ((p.sk + BN - 1) / BN);
}

__device__ __forceinline__ void finish(const float (&o)[DV / 2], const Row& row, const Work& w, const Params& p, int r0,
                                       int lane) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = row.sum[r];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const bool empty = row.top[r] == -INF;
    const float inverse = empty ? 0.0f : 1.0f / sum;
    const int q = w.m0 + r0 + 8 * r;
    unsigned short* to = p.out + ((long long)(w.b * (long long)p.sq + q) * p.hq + w.head) * DV;
#pragma unroll
    for (int c = 0; c < DV / 32; ++c) {
      u32 a[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = 4 * (4 * c + j) + 2 * r;
        a[j] = pack(o[at] * inverse, o[at + 1] * inverse);
      }
      transpose(a, lane);
      if (q < p.sq) *(uint4*)(to + 32 * c + 8 * (lane & 3)) = make_uint4(a[0], a[1], a[2], a[3]);
    }
    if (q < p.sq && (lane & 3) == 0)
      p.lse[(long long)(w.b * p.hq + w.head) * p.sq + q] =
          empty ? -INF : (row.top[r] + __log2f(sum)) * 0.6931471805599453f;
  }
}

// The next tile of work that sees keys; writes those that see none. False at the end.
__device__ __forceinline__ bool next_work(Work& w, Row& row, const Params& p, const Shared& s, int r0, int lane,
                                          Count& count) {
  for (;;) {
    const int at = count.work & 1;
    wait(s.work_full + 8 * at, count.work >> 1 & 1);
    const int t = s.work[at];
    __syncwarp();
    if (lane == 0) arrive(s.work_empty + 8 * at);
    ++count.work;
    if (t >= p.heads * p.m_tiles) return false;
    w = work_of(p, t);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int q = w.m0 + r0 + 8 * r;
      row.top[r] = -INF;
      row.sum[r] = 0.0f;
      row.factor[r] = p.scale;
      if (HF_SCORES && q < p.sq) row.factor[r] *= p.q_scale[(long long)(w.b * p.hq + w.head) * p.sq + q];
      row.last[r] = HF_CAUSAL ? min(p.sk - 1, q + p.sk - p.sq) : p.sk - 1;
    }
    if (w.tiles > 0) return true;
    float o[DV / 2];
#pragma unroll
    for (int i = 0; i < DV / 2; ++i) o[i] = 0.0f;
    finish(o, row, w, p, r0, lane);
  }
}

// q of the next tile, if it is kept in registers or has to be made.
__device__ __forceinline__ void fetch_q(Row& row, const Params& p, const Shared& s, const Work& w, int wg, int lane,
                                        int r0, const Count& count) {
  const int at = uniform(count.q % Q_STAGES);
#if HF_SPARSE
  load_sparse(row, p, (long long)(w.b * p.hq + w.head), w.m0 + r0, w.m0 / 64 + wg, lane & 3);
#elif HF_CODE
  expand_q(p, s, w, wg);
#else
  wait(s.q_full + 8 * at, count.q / Q_STAGES & 1);
#endif
#if HF_QREGS
  load_q(row, s, wg, lane, at);
#endif
}

// The scores and probabilities of a tile's first keys, with nothing to overlap.
__device__ __forceinline__ void start(Score (&x)[BN / 2], u32 (&prob)[BN / 4], Row& row, const Params& p,
                                      const Shared& s, const Work& w, int wg, int lane, int r0, Count& count) {
  const int at_k = uniform(count.k % STAGES), at_q = uniform(count.q % Q_STAGES);
  const float of_k = HF_SCORES ? k_scale_of(p, w)[w.tiles - 1] : 1.0f;
  float shrink[2];
  bool skip;
  fetch_q(row, p, s, w, wg, lane, r0, count);
  wait(s.k_full + 8 * at_k, count.k / STAGES & 1);
  scores(x, row, s, wg, at_q, at_k);
  wgmma_wait<0>();
  pin(x);
  release(s.k_empty + 8 * at_k, lane);
  if (w.tiles == 1 && !HF_QREGS && lane == 0) arrive(s.q_empty + 8 * at_q);
  ++count.k;
  soften<true>(x, row, shrink, of_k, (w.tiles - 1) * BN + 2 * (lane & 3), wg, skip);
  pack_all(prob, x);
}

// The last product of a tile of queries.
__device__ __forceinline__ void end(u32 (&prob)[BN / 4], float (&o)[DV / 2], const Shared& s, int lane, Count& count,
                                    bool skip) {
  const int at_v = uniform(count.v % STAGES);
  wait(s.v_full + 8 * at_v, count.v / STAGES & 1);
  if (!HF_SKIP || !__any_sync(~0u, skip)) {
    times_v(o, prob, s, at_v);
    wgmma_wait<0>();
    pin(o);
  }
  release(s.v_empty + 8 * at_v, lane);
  ++count.v;
}

__device__ __forceinline__ void consume(const Params& p, const Shared& s, int wg) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
  const int r0 = wg * 64 + warp * 16 + (lane >> 2);
  Count count = {0, 0, 0, 0};
  Score x[BN / 2];
  float o[DV / 2], shrink[2];
  u32 prob[BN / 4];
  Work w;
  Row row;
  if (HF_PINGPONG && wg == HF_WGS - 1) turn_pass(wg);
  if (!next_work(w, row, p, s, r0, lane, count)) return;
  start(x, prob, row, p, s, w, wg, lane, r0, count);
  for (;;) {
    const float* k_scale = k_scale_of(p, w);
    // Tiles that all rows of the warpgroup see whole.
    int whole = p.sk / BN, n = w.tiles - 2;
    bool skip = false;
    if (HF_CAUSAL) whole = min(whole, max(w.m0 + wg * 64 + p.sk - p.sq + 1, 0) / BN);
#pragma unroll
    for (int i = 0; i < DV / 2; ++i) o[i] = 0.0f;
    for (; n >= whole; --n) {
      if (step<true, true>(x, prob, o, row, s, wg, lane, n, k_scale, count, shrink, skip)) multiply(o, shrink);
      pack_all(prob, x);
    }
    for (; n >= 0; --n) {
      const bool rescale =
          HF_SKIP && __any_sync(~0u, skip)
              ? step<false, false>(x, prob, o, row, s, wg, lane, n, k_scale, count, shrink, skip)
              : step<false, true>(x, prob, o, row, s, wg, lane, n, k_scale, count, shrink, skip);
      if (rescale) multiply(o, shrink);
      if (!HF_SKIP || !skip) pack_all(prob, x);
    }
    ++count.q;
#if HF_ACROSS
    // The first scores of the next tile of queries go with the last product of this one.
    const Work before = w;
    Row done;
    done.top[0] = row.top[0], done.top[1] = row.top[1], done.sum[0] = row.sum[0], done.sum[1] = row.sum[1];
    if (!next_work(w, row, p, s, r0, lane, count)) {
      end(prob, o, s, lane, count, skip);
      finish(o, done, before, p, r0, lane);
      return;
    }
    fetch_q(row, p, s, w, wg, lane, r0, count);
    if (HF_SKIP && __any_sync(~0u, skip))
      step<true, false>(x, prob, o, row, s, wg, lane, w.tiles - 1, k_scale_of(p, w), count, shrink, skip);
    else
      step<true, true>(x, prob, o, row, s, wg, lane, w.tiles - 1, k_scale_of(p, w), count, shrink, skip);
    finish(o, done, before, p, r0, lane);
    pack_all(prob, x);
#else
    end(prob, o, s, lane, count, skip);
    finish(o, row, w, p, r0, lane);
    if (!next_work(w, row, p, s, r0, lane, count)) return;
    start(x, prob, row, p, s, w, wg, lane, r0, count);
#endif
  }
}

__device__ __forceinline__ void work(const TensorMap* mq, const TensorMap* mk, const TensorMap* mv, const Params& p,
                                     unsigned char* raw) {
  const u32 start = (shared_address(raw) + 1023) / 1024 * 1024;
  Shared s;
  s.q = start;
  s.k = s.q + (HF_SPARSE ? 0 : Q_STAGES * Q_BYTES);
  s.v = s.k + STAGES * K_BYTES;
  s.q_full = s.v + STAGES * V_BYTES;
  s.q_empty = s.q_full + 16;
  s.work_full = s.q_full + 32;
  s.work_empty = s.q_full + 48;
  s.k_full = s.q_full + 64;
  s.k_empty = s.k_full + 8 * STAGES;
  s.v_full = s.k_empty + 8 * STAGES;
  s.v_empty = s.v_full + 8 * STAGES;
  s.work = (int*)(raw + (s.v_empty + 8 * STAGES - shared_address(raw)));
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      barrier_init(s.q_full + 8 * i, 1);
      barrier_init(s.q_empty + 8 * i, 4 * HF_WGS);
      barrier_init(s.work_full + 8 * i, 1);
      barrier_init(s.work_empty + 8 * i, 4 * HF_WGS);
    }
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(s.k_full + 8 * i, 1);
      barrier_init(s.v_full + 8 * i, 1);
      barrier_init(s.k_empty + 8 * i, 4 * HF_WGS * HF_CLUSTER);
      barrier_init(s.v_empty + 8 * i, 4 * HF_WGS * HF_CLUSTER);
    }
    barriers_ready();
  }
  __syncthreads();
#if HF_CLUSTER > 1
  meet();
#endif
  const int wg = uniform(threadIdx.x / 128);
  if (wg == 0) {
    few_registers();
    if (threadIdx.x == 0) produce(p, s, mq, mk, mv);
  } else {
    many_registers();
    consume(p, s, wg - 1);
  }
#if HF_CLUSTER > 1
  __syncwarp();
  meet();  // the other block may still write here
#endif
}

#ifndef HF_HOST
#if HF_CLUSTER > 1
#define CLUSTERED __cluster_dims__(HF_CLUSTER, 1, 1)
#else
#define CLUSTERED
#endif

extern "C" __global__ void CLUSTERED __launch_bounds__(128 * (HF_WGS + 1), 1)
    hopper_forward(const __grid_constant__ TensorMap mq, const __grid_constant__ TensorMap mk,
                   const __grid_constant__ TensorMap mv, const __grid_constant__ Params p) {
  extern __shared__ unsigned char raw[];
  work(&mq, &mk, &mv, p, raw);
}
#endif
